"""Preference records: reading rows in any format, and decoding their images."""
