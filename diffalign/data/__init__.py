"""Preference data: readers for the common layouts, a cache of latents and text embeddings, keyed pairs and batches."""

from diffalign.data.binary_feedback import Balanced, LikedImages
from diffalign.data.cache import LatentCache
from diffalign.data.choices import FeatureEncoder, PersonalChoices
from diffalign.data.groups import PreferenceGroups
from diffalign.data.image_folder import TargetImages, Winners
from diffalign.data.latent_settings import check_latents
from diffalign.data.latents import PreferenceLatents
from diffalign.data.loader import KeyedLoader
from diffalign.data.pairs import PreferencePairs
from diffalign.data.prompts import Prompts
from diffalign.data.ranked import RankedImages
from diffalign.data.readers import read_records
from diffalign.data.records import Dropped, ImageRef, Record
from diffalign.data.users import UserPairs

__all__ = [
    "Balanced",
    "Dropped",
    "FeatureEncoder",
    "ImageRef",
    "KeyedLoader",
    "LatentCache",
    "LikedImages",
    "PersonalChoices",
    "PreferenceGroups",
    "PreferenceLatents",
    "PreferencePairs",
    "Prompts",
    "RankedImages",
    "Record",
    "TargetImages",
    "UserPairs",
    "Winners",
    "check_latents",
    "read_records",
]
