"""Settings that every test shares."""

from hypothesis import HealthCheck, settings

HEALTH = [HealthCheck.too_slow]
settings.register_profile(
    "meshwright", deadline=None, suppress_health_check=HEALTH, derandomize=True
)
settings.register_profile("hunt", deadline=None, suppress_health_check=HEALTH)
settings.load_profile("meshwright")
"""The same cases every time; new ones: make test ARGS="--hypothesis-profile=hunt"."""
