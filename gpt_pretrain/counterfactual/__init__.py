"""The same run without a document, or with one, or with an intervention: arms that differ from it in that alone."""
