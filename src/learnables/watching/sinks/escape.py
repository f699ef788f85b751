"""Names of parameters are hostile input; each kind of text has its one escape here.

``register_parameter`` refuses only dots and the empty name, so ``</script>``, ``=cmd|calc``, line
breaks and terminal sequences are all legal names, and checkpoints bring names of strangers.
"""

import hashlib
import json
import re
import unicodedata
from html import escape as _escape
from typing import Any

from learnables.errors import visible as visible


def html(text: str) -> str:
    """For the text of an element and for a quoted attribute.

    Example:
        >>> html('<b title="x">')
        '&lt;b title=&quot;x&quot;&gt;'
    """
    return _escape(visible(text), quote=True)


def json_in_script(value: Any) -> str:
    r"""A JSON value that may stand inside ``<script type="application/json">``.

    Inside a script element no entity is read, and ``</script>`` or ``<!--`` end or change it
    wherever they stand; so the three characters they need are written as JSON's own escapes.
    Non-finite numbers become null, which JSON has.

    Example:
        >>> json_in_script("</script>")
        '"\\u003c/script\\u003e"'
    """
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def csv(text: str) -> str:
    r"""One cell of a CSV file, always quoted, never a formula.

    Spreadsheets compute cells that begin with ``= + - @`` or a tab; a leading apostrophe makes
    them text.

    Example:
        >>> csv("=1+1")
        '"\'=1+1"'
    """
    text = visible(text)
    if text.lstrip()[:1] in ("=", "+", "-", "@", "＝", "＋", "－", "＠"):
        text = "'" + text
    return '"' + text.replace('"', '""') + '"'


def github(text: str, attribute: bool = False) -> str:
    r"""For a GitHub workflow command: its message, or one of its properties.

    Example:
        >>> github("50%\n::error::x")
        '50%25%0A::error::x'
    """
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    if attribute:
        text = text.replace(":", "%3A").replace(",", "%2C")
    return visible(text)


def file_name(text: str) -> str:
    """A file name that is safe everywhere and differs for different texts.

    Example:
        >>> file_name("blocks.0.weight")
        'blocks.0.weight'
        >>> file_name("../../etc/passwd")
        'etc-passwd-3754d6cb'
    """
    slug = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._-]+|\.{2,}", "-", slug).strip("-. ")[:80]
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", slug)
    if slug == text and not reserved:
        return slug
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{slug.replace('.', '-').strip('-')}-{digest}".lstrip("-")


def tensorboard_tag(text: str) -> str:
    """A TensorBoard tag; its dots become slashes, so that modules fold as groups.

    Example:
        >>> tensorboard_tag("blocks.0.weight")
        'blocks/0/weight'
    """
    return visible(text).replace(".", "/").strip("/ ") or "unnamed"
