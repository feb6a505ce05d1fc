"""What a prepared dataset is: its files and digests, its token streams, its documents. Imports nothing else of ours."""
