"""The merge methods, a file for each kind. Importing this package registers them all."""

from sdmerge.methods import linear as linear
