"""The networks against an independent forward pass, and against themselves."""

from __future__ import annotations
