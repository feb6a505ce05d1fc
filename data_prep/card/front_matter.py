"""What Hugging Face's hub wants to know of a dataset, as far as it can be known."""

import re

from data_prep.card.page import title_of
from data_prep.card.summary import Summary
from data_prep.store.manifest import DOCUMENTS, Manifest

_HUB_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_ISO_LANGUAGE = re.compile("[a-z]{2,3}")
_MAX_LANGUAGES = 20


def front_matter(manifest: Manifest, total: Summary) -> dict[str, object]:
    """JSON values by key, for the head of README.md."""
    names = [name for name, _ in total.languages.top(_MAX_LANGUAGES)]
    languages = [name for name in names if _ISO_LANGUAGE.fullmatch(name)]
    files = [{"split": split, "path": f"{DOCUMENTS}_{split}_*.parquet"} for split in manifest.splits]
    return {
        "pretty_name": title_of(manifest.spec.source),
        **({"language": languages} if languages else {}),
        "size_categories": [size_category(total.num_documents)],
        "task_categories": ["text-generation"],
        "configs": [{"config_name": DOCUMENTS, "data_files": files}],
    }


def size_category(num_documents: int) -> str:
    """
    >>> size_category(999), size_category(1000), size_category(10**12)
    ('n<1K', '1K<n<10K', 'n>1T')
    """
    exponent = max(3, len(str(num_documents)))  # 1,000 has 4 digits: 1K<n<10K
    place = min(exponent - 3, len(_HUB_SIZES))
    low, high = (["", *_HUB_SIZES][place], [*_HUB_SIZES, ""][place])
    return f"n<{high}" if not low else f"{low}<n<{high}" if high else f"n>{low}"
