// The smallest program that uses the installed library.
#include <expar/version.h>

#include <cstdio>

int main() { return std::puts(expar::version()) < 0; }
