"""Preference data: readers for the common layouts, a cache of latents and text embeddings, keyed pairs and batches."""

from diffalign.data.cache import LatentCache
from diffalign.data.groups import PreferenceGroups
from diffalign.data.loader import KeyedLoader
from diffalign.data.pairs import PreferencePairs, check_pairs
from diffalign.data.readers import read_records
from diffalign.data.records import Dropped, ImageRef, Record

__all__ = [
    "Dropped",
    "ImageRef",
    "KeyedLoader",
    "LatentCache",
    "PreferenceGroups",
    "PreferencePairs",
    "Record",
    "check_pairs",
    "read_records",
]
