"""Networks of other packages, each trained a few steps split and whole: `make zoo`, outside the tests."""
