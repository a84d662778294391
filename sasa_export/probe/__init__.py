"""The probe: its features, its fit, its threshold and its figures."""
