"""Thin services: translate, call, translate."""
