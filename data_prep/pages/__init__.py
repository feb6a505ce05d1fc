"""What a person looks at: self-contained HTML pages, numbers in words, progress. Imports nothing else of ours."""
