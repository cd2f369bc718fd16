"""README's table of tested architectures, made from what the tests run. As a script it rewrites README."""

from pathlib import Path

import tiny
from rank_group import CASES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

README = Path(__file__).parents[1] / "README.md"
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


def replaced(readme: str) -> str:
    """README with the table as it should be."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(replaced(README.read_text()))
