"""The laws behind rarefy.check_method, by subject."""
