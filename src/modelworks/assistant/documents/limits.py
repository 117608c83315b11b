"""What `reader`'s process may use, set by itself before it looks at the document."""

from __future__ import annotations

import resource

MEMORY = 2 << 30
"""Bytes of address space."""
COMPUTING_S = 120
OCR_MEMORY = 6 << 30
OCR_COMPUTING_S = 600
WALL_S = 900.0
"""Seconds that it may take in all, of which most can be waiting for a processor."""


def confine() -> None:
    """Limit this process: memory, computing, no file is written, no core is dumped."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, OCR_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (COMPUTING_S, OCR_COMPUTING_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_ocr() -> None:
    """Allow this process what OCR needs: its models' memory, and seconds for each page."""
    for what, most in ((resource.RLIMIT_AS, OCR_MEMORY), (resource.RLIMIT_CPU, OCR_COMPUTING_S)):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
