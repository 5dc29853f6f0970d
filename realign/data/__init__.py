"""Preference records: reading rows of any source, and decoding their images."""
