"""Where the numbers of a run are shown while it goes on; a file per tracker."""
