"""The field's benchmarks, read from local files in their own formats. One file per format, and the dict of kinds.

Nothing is downloaded. Each file names the format it reads and the instruction it puts behind the questions.
"""

from megavlm.evaluation.benchmarks.ai2d import AI2D
from megavlm.evaluation.benchmarks.benchmark import Benchmark, BenchmarkFiles
from megavlm.evaluation.benchmarks.chartqa import CHARTQA
from megavlm.evaluation.benchmarks.coco_caption import COCO_CAPTION
from megavlm.evaluation.benchmarks.docvqa import DOCVQA, INFOGRAPHICVQA
from megavlm.evaluation.benchmarks.gqa import GQA
from megavlm.evaluation.benchmarks.llava import LLAVA
from megavlm.evaluation.benchmarks.mmmu import MMMU
from megavlm.evaluation.benchmarks.ocrbench import OCRBENCH
from megavlm.evaluation.benchmarks.textvqa import TEXTVQA
from megavlm.evaluation.benchmarks.vqav2 import VQAV2

BENCHMARKS: dict[str, Benchmark] = {
    "ai2d": AI2D,
    "chartqa": CHARTQA,
    "coco_caption": COCO_CAPTION,
    "docvqa": DOCVQA,
    "gqa": GQA,
    "infographicvqa": INFOGRAPHICVQA,
    "llava": LLAVA,
    "mmmu": MMMU,
    "ocrbench": OCRBENCH,
    "textvqa": TEXTVQA,
    "vqav2": VQAV2,
}

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkFiles"]
