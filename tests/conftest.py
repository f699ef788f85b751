"""One thread per test process, Hypothesis without a deadline."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "learnables", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("learnables")
