"""Writes the script with which a shell completes commands, options and their choices."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

PROGRAM = "hot-experts"

_BASH = """\
_hot_experts() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@COMMANDS@"
    else
        case "${COMP_WORDS[1]} $before" in
@CHOICES@
        *)
            case "${COMP_WORDS[1]}" in
@OPTIONS@
            esac
            case "$word" in -*) ;; *) words= ;; esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _hot_experts @PROGRAM@
"""
_ZSH = "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n"


SHELLS = ("bash", "zsh", "fish")


def completion_script(parsers: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """Return the script for one of `SHELLS`; whatever is no command, option or choice completes as a file name."""
    if shell == "fish":
        return _fish_script(parsers)
    choices, options = [], []
    for name, parser in parsers.items():
        flags: list[str] = []
        for action in parser._actions:
            flags += action.option_strings
            words = _words(action)
            if words and action.option_strings:
                cases = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                choices.append(f'        {cases}) words="{" ".join(words)}" ;;')
            elif words:
                choices.append(f'        "{name} {name}") words="{" ".join(words)}" ;;')
        options.append(f'            {name}) words="{" ".join(flags)}" ;;')
    script = _BASH.replace("@COMMANDS@", " ".join(parsers)).replace("@PROGRAM@", PROGRAM)
    script = script.replace("@CHOICES@", "\n".join(choices)).replace("@OPTIONS@", "\n".join(options))
    return (_ZSH if shell == "zsh" else "") + script


def _fish_script(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return a `complete` command for each command and option."""
    lines = [f"complete -c {PROGRAM} -n __fish_use_subcommand -f -a '{' '.join(parsers)}'"]
    for name, parser in parsers.items():
        start = f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {name}'"
        for action in parser._actions:
            words = _words(action)
            flags = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings]
            value = f" -x -a '{' '.join(words)}'" if words else "" if action.nargs == 0 else " -r"
            if flags:
                lines.append(f"{start} {' '.join(flags)}{value}")
            elif words:
                lines.append(f"{start}{value}")
    return "\n".join(lines) + "\n"


def _words(action: argparse.Action) -> list[str]:
    """Return what may follow an option, or stand in place of an argument, if that is a choice."""
    return [str(choice) for choice in action.choices or _choices(action.metavar)]


def _choices(metavar: object) -> list[str]:
    """Return the choices that a setting shows in its help, such as f32|f16|q8_0."""
    words = metavar.split("|") if isinstance(metavar, str) else []
    return words if len(words) > 1 and all(word.islower() for word in words) else []
