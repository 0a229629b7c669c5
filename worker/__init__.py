"""The workshop: claims jobs and runs their stages."""
