"""The parts of the site that are made from the code."""

from . import guide_pictures as guide_pictures
