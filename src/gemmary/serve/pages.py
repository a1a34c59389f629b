"""A page of this package, and the policy that lets a browser run the page's own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

__all__ = ["page_headers", "page_of"]


def page_of(name: str) -> bytes:
    """The page as it is in this folder."""
    return (resources.files("gemmary.serve") / name).read_bytes()


def page_headers(page: bytes) -> dict[str, str]:
    """Scripts and styles are those inside the page, by their digests; nothing is fetched from elsewhere, and no text becomes HTML."""

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        found = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inside]
        return " ".join(f"'sha256-{digest}'" for digest in found) or "'none'"

    policy = {
        "default-src": "'none'", "script-src": hashes("script"), "style-src": hashes("style"), "connect-src": "'self'",
        "img-src": "'none'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    policy_ = "; ".join(f"{name} {value}" for name, value in policy.items())
    return {"content-security-policy": policy_, "x-frame-options": "DENY"}
