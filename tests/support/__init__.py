"""What the tests share: the real programs, ways to run both programs, image builders, the 7.2 normaliser."""
