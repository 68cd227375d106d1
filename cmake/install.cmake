# What `cmake --install` puts where, and what find_package(expar) reads afterwards.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(expar_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/expar)

install(TARGETS expar EXPORT expar-targets FILE_SET HEADERS)
install(EXPORT expar-targets NAMESPACE expar:: DESTINATION ${expar_package_dir})

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/expar-config.cmake.in
                              ${PROJECT_BINARY_DIR}/expar-config.cmake
                              INSTALL_DESTINATION ${expar_package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/expar-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/expar-config.cmake
              ${PROJECT_BINARY_DIR}/expar-config-version.cmake
        DESTINATION ${expar_package_dir})

if(TARGET expar_cli)
  install(TARGETS expar_cli)
endif()
