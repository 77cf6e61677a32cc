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


def completion_script(parsers: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """Return the script for "bash" or "zsh"; whatever is no command, option or choice completes as a file name."""
    choices, options = [], []
    for name, parser in parsers.items():
        flags: list[str] = []
        for action in parser._actions:
            flags += action.option_strings
            words = [str(choice) for choice in action.choices or _choices(action.metavar)]
            if words and action.option_strings:
                cases = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                choices.append(f'        {cases}) words="{" ".join(words)}" ;;')
            elif words:
                choices.append(f'        "{name} {name}") words="{" ".join(words)}" ;;')
        options.append(f'            {name}) words="{" ".join(flags)}" ;;')
    script = _BASH.replace("@COMMANDS@", " ".join(parsers)).replace("@PROGRAM@", PROGRAM)
    script = script.replace("@CHOICES@", "\n".join(choices)).replace("@OPTIONS@", "\n".join(options))
    return (_ZSH if shell == "zsh" else "") + script


def _choices(metavar: object) -> list[str]:
    """Return the choices that a setting shows in its help, such as f32|f16|q8_0."""
    words = metavar.split("|") if isinstance(metavar, str) else []
    return words if len(words) > 1 and all(word.islower() for word in words) else []
