// SPDX-License-Identifier: Apache-2.0
// Accumulators in inline assembly: VC_NAMES_n is the list of the first n operands, VC_SUMS_n(d) what binds d[0 .. n -
// 1] to them.
#pragma once

#define VC_NAMES_4 "%0, %1, %2, %3"
#define VC_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VC_NAMES_16 VC_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VC_NAMES_24 VC_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define VC_NAMES_32 VC_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define VC_NAMES_40 VC_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VC_NAMES_48 VC_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VC_NAMES_56 VC_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define VC_NAMES_64 VC_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define VC_NAMES_72 VC_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define VC_NAMES_80 VC_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define VC_NAMES_88 VC_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define VC_NAMES_96 VC_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define VC_NAMES_104 VC_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define VC_NAMES_112 VC_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"

#define VC_SUMS_AT(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VC_SUMS_4(d) VC_SUMS_AT(d, 0)
#define VC_SUMS_8(d) VC_SUMS_4(d), VC_SUMS_AT(d, 4)
#define VC_SUMS_16(d) VC_SUMS_8(d), VC_SUMS_AT(d, 8), VC_SUMS_AT(d, 12)
#define VC_SUMS_24(d) VC_SUMS_16(d), VC_SUMS_AT(d, 16), VC_SUMS_AT(d, 20)
#define VC_SUMS_32(d) VC_SUMS_24(d), VC_SUMS_AT(d, 24), VC_SUMS_AT(d, 28)
#define VC_SUMS_40(d) VC_SUMS_32(d), VC_SUMS_AT(d, 32), VC_SUMS_AT(d, 36)
#define VC_SUMS_48(d) VC_SUMS_40(d), VC_SUMS_AT(d, 40), VC_SUMS_AT(d, 44)
#define VC_SUMS_56(d) VC_SUMS_48(d), VC_SUMS_AT(d, 48), VC_SUMS_AT(d, 52)
#define VC_SUMS_64(d) VC_SUMS_56(d), VC_SUMS_AT(d, 56), VC_SUMS_AT(d, 60)
#define VC_SUMS_72(d) VC_SUMS_64(d), VC_SUMS_AT(d, 64), VC_SUMS_AT(d, 68)
#define VC_SUMS_80(d) VC_SUMS_72(d), VC_SUMS_AT(d, 72), VC_SUMS_AT(d, 76)
#define VC_SUMS_88(d) VC_SUMS_80(d), VC_SUMS_AT(d, 80), VC_SUMS_AT(d, 84)
#define VC_SUMS_96(d) VC_SUMS_88(d), VC_SUMS_AT(d, 88), VC_SUMS_AT(d, 92)
#define VC_SUMS_104(d) VC_SUMS_96(d), VC_SUMS_AT(d, 96), VC_SUMS_AT(d, 100)
#define VC_SUMS_112(d) VC_SUMS_104(d), VC_SUMS_AT(d, 104), VC_SUMS_AT(d, 108)
