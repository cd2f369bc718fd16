"""The table of tested architectures in docs/support.md, made from what the tests run. As a script it rewrites it."""

from pathlib import Path

import tiny
from rank_group import CASES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
BEGIN, END = "<!-- support table: make support-table -->\n", "<!-- end of support table -->"


def architecture(name: str) -> str:
    """The architecture of a tiny model, as its checkpoint names it."""
    config_cls, _ = (tiny.CONFIGS | tiny.MORE_CONFIGS)[name]
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_cls.model_type]


def table() -> str:
    rows = ["| Architecture | SP x TP in `make test` | in `make test-nightly` |", "| --- | --- | --- |"]
    for tested in sorted({architecture(case.name) for case in CASES}):
        cells = []
        for nightly in (False, True):
            cases = [case for case in CASES if architecture(case.name) == tested and case.nightly == nightly]
            cells.append(", ".join(dict.fromkeys(f"{case.sp} x {case.tp}" for case in cases)))
        rows.append(f"| `{tested}` | {cells[0]} | {cells[1]} |")
    return "\n".join(rows) + "\n"


def replaced(page: str) -> str:
    """The page with the table as it should be."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
