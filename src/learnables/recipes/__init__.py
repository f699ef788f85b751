"""Complete training jobs that use the whole library; what `learnables train …` runs."""
