"""Tests that need TRITON_INTERPRET=1 set before anything is imported; tests/test_triton_interpreter.py runs them."""
