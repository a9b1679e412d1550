"""Makes schedules for a pipeline of given times and memory, by list scheduling and annealing."""
