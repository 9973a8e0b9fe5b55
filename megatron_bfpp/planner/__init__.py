"""What a job will need and take, before it is started. Imports schedule/ only."""
