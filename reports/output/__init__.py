"""Write reports as HTML pages, PDF documents, and tables for spreadsheets and papers."""
