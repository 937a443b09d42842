SUFFIXES = ("weight",)
