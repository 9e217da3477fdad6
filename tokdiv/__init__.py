"""tokdiv: which frozen teacher has the most diverse tokens?

The names below are loaded on first use, so that `import tokdiv` does not load torch.
"""

from typing import TYPE_CHECKING

from tokdiv.lazy import lazy_names

if TYPE_CHECKING:
    from tokdiv.certify import certify_order, confidence_sequence
    from tokdiv.correspondence import correspondence
    from tokdiv.errors import RunError, UsageError
    from tokdiv.hand_over import load_ranking
    from tokdiv.metric import TokenSimilarity
    from tokdiv.rank import rank
    from tokdiv.ranking import Ranking
    from tokdiv.similarity import token_similarity
    from tokdiv.teachers.load import load_teacher
    from tokdiv.teachers.notation import parse_specs
    from tokdiv.teachers.spec import TeacherSpec
    from tokdiv.teachers.teacher import Teacher

__version__ = "0.1.0"

_HOMES = {
    "Ranking": "ranking",
    "RunError": "errors",
    "Teacher": "teachers.teacher",
    "TeacherSpec": "teachers.spec",
    "TokenSimilarity": "metric",
    "UsageError": "errors",
    "certify_order": "certify",
    "confidence_sequence": "certify",
    "correspondence": "correspondence",
    "load_ranking": "hand_over",
    "load_teacher": "teachers.load",
    "parse_specs": "teachers.notation",
    "rank": "rank",
    "token_similarity": "similarity",
}

__all__ = [
    "Ranking",
    "RunError",
    "Teacher",
    "TeacherSpec",
    "TokenSimilarity",
    "UsageError",
    "certify_order",
    "confidence_sequence",
    "correspondence",
    "load_ranking",
    "load_teacher",
    "parse_specs",
    "rank",
    "token_similarity",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
