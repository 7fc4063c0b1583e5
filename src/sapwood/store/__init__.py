"""Where model files come from: a catalogue, PyPI wheels, the hub, or a local path. Torch-free."""

from sapwood.store.catalogue import CatalogueEntry, load_catalogue
from sapwood.store.fetch import ModelStore, fetch_model, open_store
from sapwood.store.files import ModelFiles, detect_format
from sapwood.store.progress import Progress, Silent
from sapwood.store.sources import Fetched, Source, SourceFailed

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
