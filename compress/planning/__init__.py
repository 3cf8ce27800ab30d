"""Give a size, get the best model: a setting for every matrix, so that the file is no larger."""
