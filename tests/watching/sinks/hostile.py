"""Five hundred names that are legal for a parameter and mean something to some program."""

MARKUP = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "</title><script>alert(1)</script>",
    "</style><style>*{display:none}",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)" autofocus="',
    "<!--<script>",
    "-->",
    "<a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;",
    "&#x3c;script&#x3e;alert(1)",
    "<iframe src=//localhost:9/>",
    "<link rel=stylesheet href=//localhost:9/x>",
    "<meta http-equiv=refresh content=0>",
    "<base href=//localhost:9/>",
    "<form action=//localhost:9/>",
    "{{7*7}}",
    "{% for x in y %}",
    "${alert(1)}",
    "`alert(1)`",
    "]]>",
    "<![CDATA[x",
    "javascript:alert(1)",
    "\u2028alert(1)",
    "\\u003cscript\\u003e",
]
FORMULAS = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1+1",
    " =1+1",
    "＝1+1",
    '=HYPERLINK("http://localhost")',
    '"=1',
]
COMMANDS = [
    "::error file=x::y",
    "%0A::set-output name=x::y",
    "a\n::add-mask::b",
    "a\r\n::stop-commands::x",
    "##[error]x",
]
TERMINAL = [
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x07y",
    "\x9b31m",
    "a\rb",
    "a\x08b",
    "\x07",
    "[red]x[/red]",
    "[link=http://localhost]x[/link]",
    "\u202egnp",
    "\u2066a\u2069",
    "\u200b",
    "\ufeffa",
]
PATHS = [
    "/etc/passwd",
    "C:\\x",
    "con",
    "NUL",
    "a" * 300,
    "a:b",
    "a*b?",
    "~",
    "-rf",
    " ",
    "a b",
    "a/b",
    "\x00",
    "a\x00b",
]
WORDS = [
    "weight",
    "类别标记",
    "параметр",
    "é",
    "e\u0301",
    "😀",
    "١",
    "\ud800",
    "\udc00x",
    "\U000e0001",
    "null",
    "NaN",
    "__proto__",
    "constructor",
    "'; DROP TABLE scalars; --",
    "%s%s%n",
    "{0}",
    "a,b;c\td",
]
ENDINGS = ["", '"', "</script>", "\n=1", "\x1b[0m", "\\"]


def names() -> list[str]:
    """All of them with all endings; no dots, which torch refuses."""
    plain = [*MARKUP, *FORMULAS, *COMMANDS, *TERMINAL, *PATHS, *WORDS]
    found = dict.fromkeys(name + ending for name in plain for ending in ENDINGS)
    return [name for name in found if "." not in name]
