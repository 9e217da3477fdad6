"""tokdiv: which frozen teacher has the most diverse tokens?

The names below are loaded on first use, so that `import tokdiv` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokdiv.certify import certify_order, confidence_sequence
    from tokdiv.measure import rank
    from tokdiv.metric import TokenSimilarity
    from tokdiv.ranking import Ranking, load_ranking
    from tokdiv.similarity import token_similarity
    from tokdiv.spec import TeacherSpec, parse_specs
    from tokdiv.teacher import Teacher, load_teacher

__version__ = "0.1.0"

_HOME = {
    "Ranking": "ranking",
    "Teacher": "teacher",
    "TeacherSpec": "spec",
    "TokenSimilarity": "metric",
    "certify_order": "certify",
    "confidence_sequence": "certify",
    "load_ranking": "ranking",
    "load_teacher": "teacher",
    "parse_specs": "spec",
    "rank": "measure",
    "token_similarity": "similarity",
}

__all__ = [
    "Ranking",
    "Teacher",
    "TeacherSpec",
    "TokenSimilarity",
    "certify_order",
    "confidence_sequence",
    "load_ranking",
    "load_teacher",
    "parse_specs",
    "rank",
    "token_similarity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokdiv' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tokdiv.{_HOME[name]}"), name)
