"""Model soups: one model whose weights are the mean of several (arXiv 2203.05482; POINTS, arXiv 2409.04828)."""

from megavlm.soup.choice import METHODS, Candidate, Choice, Trial
from megavlm.soup.make import SoupSettings, make_soup
from megavlm.soup.score import ScoreSettings

__all__ = ["METHODS", "Candidate", "Choice", "ScoreSettings", "SoupSettings", "Trial", "make_soup"]
