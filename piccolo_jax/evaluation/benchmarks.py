"""CMTEB: its tasks by category, the two conventions of its mean, and published figures."""

import dataclasses
from collections.abc import Mapping

# By type of task, and in the order that tables have.
CATEGORIES = {
    "Classification": "Cls", "Clustering": "Clu", "PairClassification": "Pair",
    "Reranking": "Rer", "Retrieval": "Ret", "STS": "STS",
}  # fmt: skip

# MTEB(cmn, v1) of mteb 2.26, which a test compares.
CMTEB_2025 = {
    "T2Retrieval": "Retrieval", "MMarcoRetrieval": "Retrieval", "DuRetrieval": "Retrieval",
    "CovidRetrieval": "Retrieval", "CmedqaRetrieval": "Retrieval", "EcomRetrieval": "Retrieval",
    "MedicalRetrieval": "Retrieval", "VideoRetrieval": "Retrieval",
    "T2Reranking": "Reranking", "MMarcoReranking": "Reranking",
    "CMedQAv1-reranking": "Reranking", "CMedQAv2-reranking": "Reranking",
    "Ocnli": "PairClassification", "Cmnli": "PairClassification",
    "CLSClusteringS2S": "Clustering", "CLSClusteringP2P": "Clustering",
    "ThuNewsClusteringS2S": "Clustering", "ThuNewsClusteringP2P": "Clustering",
    "LCQMC": "STS", "PAWSX": "STS", "AFQMC": "STS", "QBQTC": "STS", "ATEC": "STS", "BQ": "STS",
    "STSB": "STS",
    "TNews": "Classification", "IFlyTek": "Classification", "Waimai": "Classification",
    "OnlineShopping": "Classification", "JDReview": "Classification",
    "MultilingualSentiment": "Classification",
}  # fmt: skip
# What the benchmark of 2024 had beside them: subsets of multilingual tasks, split `test`.
ALSO_2024 = {
    "AmazonReviewsClassification": ("Classification", "zh"),
    "MassiveIntentClassification": ("Classification", "zh-CN"),
    "MassiveScenarioClassification": ("Classification", "zh-CN"),
    "STS22": ("STS", "zh"),
}
CMTEB_2024 = CMTEB_2025 | {name: kind for name, (kind, _) in ALSO_2024.items()}


@dataclasses.dataclass(frozen=True)
class Convention:
    """How a benchmark's mean is taken: plainly over its tasks, pairs by one of two scores."""

    name: str
    tasks: Mapping[str, str]  # type by name
    pair_score: str


CONVENTIONS = (
    Convention("MTEB(cmn, v1): 31 tasks, pairs by max accuracy", CMTEB_2025, "max_accuracy"),
    # The leaderboard of 2024 took the average precision of cosines.
    Convention("CMTEB 2024: 35 tasks, pairs by average precision", CMTEB_2024, "cosine_ap"),
)

# Piccolo2 on the 35 tasks, arXiv 2405.06932: mean by dimension, and categories at full width.
PUBLISHED_NAME = "Piccolo2, published"
PUBLISHED_MEAN = {
    1792: 70.95, 1536: 70.97, 1280: 70.87, 1024: 70.80, 768: 70.69, 512: 70.41, 256: 69.99,
}  # fmt: skip
PUBLISHED_CATEGORIES = {
    "Classification": 74.59, "Clustering": 62.17, "PairClassification": 90.24,
    "Reranking": 70.00, "Retrieval": 74.36, "STS": 63.50,
}  # fmt: skip
