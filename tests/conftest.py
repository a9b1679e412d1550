"""Settings that every test shares."""

from hypothesis import HealthCheck, settings

settings.register_profile("meshwright", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("meshwright")
