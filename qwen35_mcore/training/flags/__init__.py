"""Every flag of megatron's parser: who decides it, whether it works, and why it is refused.

The rows are data, one file a subject; `table` joins them. Imports the standard library, `errors`
and `model.spec_providers`.
"""

from qwen35_mcore.training.flags.check import check_classes_while_parsing
from qwen35_mcore.training.flags.rows import Kind, Row
from qwen35_mcore.training.flags.table import GROUPS, ONLY_WITH_A_PACKAGE, TABLE, class_of, counts

__all__ = [
    "GROUPS",
    "ONLY_WITH_A_PACKAGE",
    "TABLE",
    "Kind",
    "Row",
    "check_classes_while_parsing",
    "class_of",
    "counts",
]
