"""Where model files come from: a catalogue, PyPI wheels, the hub, or a local path. Torch-free."""

from sapwood.models.store.catalogue import CatalogueEntry, load_catalogue
from sapwood.models.store.fetch import ModelStore, fetch_model, open_store
from sapwood.models.store.files import ModelFiles, detect_format
from sapwood.models.store.progress import Progress, Silent
from sapwood.models.store.sources import Fetched, Source, SourceFailed

__all__ = [
    "CatalogueEntry",
    "Fetched",
    "ModelFiles",
    "ModelStore",
    "Progress",
    "Silent",
    "Source",
    "SourceFailed",
    "detect_format",
    "fetch_model",
    "load_catalogue",
    "open_store",
]
