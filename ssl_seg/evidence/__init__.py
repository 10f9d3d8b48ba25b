"""What scores say: pairs of runs, intervals, comparisons of runs and of studies, and the sentences about them."""
