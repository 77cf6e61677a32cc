r"""Pre-tokenizers as a table of facts: how a byte-level BPE vocabulary wants a text cut before merging.

`tokenizer.ggml.pre` names an entry. Its regular expressions (Oniguruma dialect) are applied in order, each to every
piece the ones before it left; what lies between two matches stays a piece too.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import TokenizerError

# The parts that many families share.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_QWEN_2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}"
_QWEN_35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_LLAMA_3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}"


def _cased(*, contraction: str, digits: str, line_ends: str, without: str = "") -> str:
    """Return the pattern of the GPT-4o family, which also cuts a word where lower case is followed by upper case."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}|{_SYMBOLS}[{line_ends}]*|{_SPACES}"


_GPT_4O = _cased(contraction=f"{_CONTRACTION}?", digits=r"\p{N}{1,3}", line_ends=r"\r\n/")
_TEKKEN = _cased(contraction="", digits=r"\p{N}", line_ends=r"\r\n/")
_KIMI_K2 = r"\p{Han}+|" + _cased(
    contraction=f"{_CONTRACTION}?", digits=r"\p{N}{1,3}", line_ends=r"\r\n", without=r"&&[^\p{Han}]"
)
_BAILING = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"

# Words with single blanks between them are one piece.
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_ASIAN_SCRIPTS = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{3040}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}"
    r"\x{0E40}-\x{0EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}"
    r"\x{1100}-\x{11FF}]+"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

# Cased letters without the scripts that DeepSeek-LLM's list of 2729 characters leaves out.
_CASED_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}\x{10CD}\x{10D0}-\x{10FF}\x{1C80}-\x{1C8A}\x{2D00}-\x{2D2D}"
    r"\x{A790}-\x{A7FA}\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF2A}]]"
)
_CJK_HANGUL = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How one family cuts a text.

    Attributes:
        patterns: regular expressions, applied in order.
        ignore_merges: a piece that is a token as a whole is taken as it is, whatever the merges say.
        add_bos: whether a text starts with the BOS token if the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_TABLE: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "qwen2 deepseek-r1-qwen megrez kormo f2llmv2 hunyuan solar-open stablelm2 grok-2",
        PreTokenizer((_QWEN_2,)),
    ),
    ("laguna", PreTokenizer((r"[^\n]+|\n+", _QWEN_2))),
    ("qwen35", PreTokenizer((_QWEN_35,))),
    (
        "llama-bpe llama3 llama-v3 pixtral falcon3 falcon-h1 midm-2.0 lfm2",
        PreTokenizer((_LLAMA_3,), ignore_merges=True, add_bos=True),
    ),
    ("glm4 glm5", PreTokenizer((_LLAMA_3,), ignore_merges=True)),
    ("chatglm-bpe dbrx smaug-bpe", PreTokenizer((_LLAMA_3,))),
    ("gpt-4o llama4 kanana2 minimax-m2", PreTokenizer((_GPT_4O,))),
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT_4O))),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("kimi-k2", PreTokenizer((_KIMI_K2,))),
    (
        "deepseek-v3 hunyuan-dense hy_v4",
        PreTokenizer(
            (
                r"\p{N}{1,3}",
                r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
                _DEEPSEEK_V3,
            )
        ),
    ),
    ("afmoe", PreTokenizer((_DIGITS_FROM_THE_RIGHT, _ASIAN_SCRIPTS, _DEEPSEEK_V3))),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, r"\p{N}")),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?{_CASED_LETTERS}+",
                r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
                r"\s+$",
                _CJK_HANGUL,
                r"\p{N}+",
            )
        ),
    ),
    (
        "gpt-2 phi-2 olmo exaone4 mellum mpt jais trillion gigachat a.x-4.0 granite-docling",
        PreTokenizer((_GPT_2,)),
    ),
    (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        PreTokenizer((r"\p{N}", _GPT_2)),
    ),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, r"[0-9][0-9][0-9]"))),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    ("seed-coder", PreTokenizer((_SEED_CODER,))),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: entry for names, entry in _TABLE for name in names.split()}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the entry that `tokenizer.ggml.pre` names; raise `TokenizerError` if there is none."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer this version does not know; "
            f"known: {', '.join(sorted(PRE_TOKENIZERS))}"
        ) from None
