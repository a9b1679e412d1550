"""How the processes of a run start, meet, are watched, and end."""
