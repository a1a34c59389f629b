"""Documents to batches: sources and their curation, tokens on disk, packed rows and their mixture."""

from gemmary.data.classifiers import ClassifierSettings
from gemmary.data.curate import curate, read_documents
from gemmary.data.curation_report import report_table
from gemmary.data.curation_settings import CurateSettings, Slurm
from gemmary.data.decontamination import EvaluationSet
from gemmary.data.filters import CodeRules, ProseRules
from gemmary.data.sources import Source

__all__ = [
    "ClassifierSettings",
    "CodeRules",
    "CurateSettings",
    "EvaluationSet",
    "ProseRules",
    "Slurm",
    "Source",
    "curate",
    "read_documents",
    "report_table",
]
