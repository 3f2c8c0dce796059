"""Offline: a Hugging Face checkpoint becomes a pack. ``convert`` = open the source, plan, execute."""

from flashpack.converter.convert import convert, plan
from flashpack.converter.plan import Options, Plan
from flashpack.converter.report import Report

__all__ = ["Options", "Plan", "Report", "convert", "plan"]
