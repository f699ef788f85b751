"""At home in other people's trainers and models; a library is imported when it is used."""
