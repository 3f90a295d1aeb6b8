"""Generated messages and service stubs of modelyard.v1; never edited, never committed."""
