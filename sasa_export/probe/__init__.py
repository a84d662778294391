"""The probe: what it reads, how it is fitted, its threshold, and what it does."""
