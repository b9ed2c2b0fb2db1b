"""Tests that drive pages in Chromium."""
